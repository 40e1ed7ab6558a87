"""What folora stands: kills, signals, full disks, damaged files, long runs. Results are for docs/reliability.md."""
