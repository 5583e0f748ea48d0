"""One model on one device: schedules, runs and samples. Knows nothing of processes, networks or text."""
