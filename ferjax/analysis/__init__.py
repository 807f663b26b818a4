"""From predictions to scores, figures and tables."""
