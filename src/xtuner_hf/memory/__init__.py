"""What keeps the peak of memory low."""
