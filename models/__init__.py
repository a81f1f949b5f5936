"""Models: recipes that make them, their weights, and their preprocessing.

Importing this imports no torch; a model is made by ``resolve(name).load(...)``.
"""

from tome_export.models.recipe import LoadedModel, Recipe, WeightsInfo
from tome_export.models.registry import RECIPES, resolve

__all__ = ["RECIPES", "LoadedModel", "Recipe", "WeightsInfo", "resolve"]
