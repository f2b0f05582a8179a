"""The laboratory around the method: recipes, tasks, training, studies, conversion, and the ``pera`` command."""
