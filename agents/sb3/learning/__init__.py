"""A training with Stable-Baselines3: learner, checkpoints, stopping, samples."""
