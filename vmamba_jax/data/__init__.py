"""Images in: sources, augmentation, pipelines."""
