"""The picture of a recording: who held what, and when; as a page to look around in, or as SVG."""
