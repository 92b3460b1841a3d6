/*
 * Planted bugs: what the tests must catch.
 *
 * A build with -DBALE_PLANTED_BUG=BALE_PLANTED_name has that one bug; only
 * tests/planted makes such builds.  In all others BALE_PLANTED(name) is the
 * constant false, and no code remains.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef BALE_UTIL_PLANTED_H
#define BALE_UTIL_PLANTED_H

/* tests/planted/bugs says what each one does, and which rule it breaks. */
enum {
    BALE_PLANTED_none,
    BALE_PLANTED_flush_skipped,
    BALE_PLANTED_flush_error_ignored,
    BALE_PLANTED_flush_retried,
    BALE_PLANTED_flush_misses_mutable,
    BALE_PLANTED_flush_before_write,
    BALE_PLANTED_write_error_ignored,
    BALE_PLANTED_short_write_ignored,
    BALE_PLANTED_poison_forgotten,
    BALE_PLANTED_errno_dropped,
    BALE_PLANTED_fua_ignored,
    BALE_PLANTED_order_swapped,
    BALE_PLANTED_session_not_marked,
    BALE_PLANTED_super_one_copy,
    BALE_PLANTED_super_oldest,
    BALE_PLANTED_checksum_unseeded,
    BALE_PLANTED_payload_unchecked,
    BALE_PLANTED_page_reused_early,
    BALE_PLANTED_mark_skipped,
    BALE_PLANTED_mark_once,
    BALE_PLANTED_barrier_not_written,
    BALE_PLANTED_barrier_not_awaited,
    BALE_PLANTED_stale_header_believed,
    BALE_PLANTED_tail_over_damage,
    BALE_PLANTED_tail_unverified,
    BALE_PLANTED_sequence_ignored,
    BALE_PLANTED_numbers_not_shared,
    BALE_PLANTED_zero_resurrected,
    BALE_PLANTED_tombstone_forgotten,
    BALE_PLANTED_merge_forgotten,
    BALE_PLANTED_claim_forgets,
    BALE_PLANTED_batch_stale,
    BALE_PLANTED_ghosts_forgotten,
    BALE_PLANTED_resize_not_durable,
    BALE_PLANTED_cut_early,
    BALE_PLANTED_tail_not_proven,
    BALE_PLANTED_damage_unreported,
    BALE_PLANTED_revive_unwritten,
    BALE_PLANTED_generation_unchecked,
    BALE_PLANTED_checkpoint_not_flushed,
    BALE_PLANTED_chunk_unmarked,
    BALE_PLANTED_kept_part_freed,
    BALE_PLANTED_damaged_named,
    BALE_PLANTED_fallback_named,
    BALE_PLANTED_mark_not_awaited,
    BALE_PLANTED_tail_too_short,
    BALE_PLANTED_patches_not_written,
    BALE_PLANTED_patch_dropped,
    BALE_PLANTED_patch_order,
    BALE_PLANTED_patch_freed_early,
    BALE_PLANTED_patch_unhidden,
    BALE_PLANTED_fua_one_image,
    BALE_PLANTED_snapshot_not_durable,
    BALE_PLANTED_deleted_layer_resurrected,
    BALE_PLANTED_limit_ignored,
    BALE_PLANTED_full_while_paused,
    BALE_PLANTED_reads_wait_for_room,
    BALE_PLANTED_reserve_forgotten,
    BALE_PLANTED_copy_renumbered,
    BALE_PLANTED_piece_forgotten,
    BALE_PLANTED_copy_unconditional,
    BALE_PLANTED_memory_unlimited,
    BALE_PLANTED_bitmap_not_marked,
    BALE_PLANTED_bitmap_not_flushed,
    BALE_PLANTED_alias_forgotten,
    BALE_PLANTED_shared_layer_merged,
    BALE_PLANTED_flush_one_image,
    BALE_PLANTED_ahead_unbounded,
};

#ifndef BALE_PLANTED_BUG
#define BALE_PLANTED_BUG BALE_PLANTED_none
#endif

#define BALE_PLANTED(name) (BALE_PLANTED_BUG == BALE_PLANTED_##name)

#endif
