"""The web page of the models service: what is registered and served, watched and changed."""
