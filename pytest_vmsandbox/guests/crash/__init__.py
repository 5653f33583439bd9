"""What a power cut can leave on a disk."""
