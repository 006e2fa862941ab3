"""How a trained run is judged: option probabilities, references, metrics, and one report per run."""
