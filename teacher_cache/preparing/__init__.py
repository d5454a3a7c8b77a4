"""A sample as tokens and pixels: templates, label mask, vision layout, batches."""
