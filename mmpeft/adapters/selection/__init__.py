"""What decides where, how much and which: importance criteria, placement, rank controllers, masks, compaction, uncertainty."""
