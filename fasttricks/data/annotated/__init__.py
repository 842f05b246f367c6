"""The parts that images with masks and images with boxes share.

files: the names of the files that belong to an image. It needs no torch.
"""
