def recognise(shapes, hints):
    return None
