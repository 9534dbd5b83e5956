"""What touches the device: memory that ranks share, and the side stream that copies it."""
