"""What every long-running process needs: start and stop, health, metrics, logs, gRPC. Knows nothing of models."""
