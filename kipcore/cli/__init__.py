"""Implementation of the commands; `kipcore-distill` and the others call `run` of the modules here."""
