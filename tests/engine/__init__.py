"""The engine against fakes of its ports: a model in which guest and failures act between any two steps."""
