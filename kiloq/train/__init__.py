"""Training: pre-training and fine-tuning on one loop. Knows the model and its files, not the engine's queues."""
