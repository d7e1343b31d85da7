"""From free memory and a recipe to every setting, with its reason. No torch."""
