"""What a bundle is and how to run it.

One implementation of bundles, transforms, postprocessing and sessions, used by
compression and by the services, so that what is verified is what is served.
"""
