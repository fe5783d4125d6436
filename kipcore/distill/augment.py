"""Random transforms of images that a method applies alike to targets and support (DSA).

`siamese("flip_crop")(key)` is a function of a batch of images; equal keys give equal transforms, and
gradients flow through them.
"""
DSA = "color_crop_cutout_flip_scale_rotate"
