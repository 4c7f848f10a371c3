"""What a fine-tuning needs in memory, before a weight is loaded."""
