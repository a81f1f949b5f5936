"""Budgets per image: several artifacts of one model, and what decides which one an image gets."""
