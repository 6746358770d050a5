"""Parts for algorithms of Stable-Baselines3 and sb3-contrib that are used unedited."""
