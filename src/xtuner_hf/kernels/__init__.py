"""The implementations behind the seams: plain torch, and what each device does faster."""
