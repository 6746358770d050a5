"""Sampling whole responses, with keys and values kept between tokens."""
