"""The models: a catalogue (data), the artefacts on disk, and what builds them."""
