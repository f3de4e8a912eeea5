"""What every op stands on: its registration, its checks, its memory and its tiles."""
