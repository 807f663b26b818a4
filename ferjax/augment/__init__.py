"""Views of images, computed on the device."""
