"""From conversations and texts to packed token rows."""
