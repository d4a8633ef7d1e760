"""What every command begins with: a loaded model, its texts as token windows, its statistics by operand name."""
