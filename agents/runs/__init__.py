"""Running a training: set-up, the training itself, whole experiments."""
