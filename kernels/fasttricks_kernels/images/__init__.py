"""Mixup of images, and their colour augmentation with normalisation and flip: from uint8 to a network's input."""
