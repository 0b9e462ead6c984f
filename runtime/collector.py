"""Python's collector of cycles in a process whose streams must not stop."""

import gc


def spare_the_collector(*thresholds: int) -> None:
    """Never look again at what is there now: modules, models, settings. A process that has loaded
    torch has some 200,000 objects, and looking through them stops every stream for 0.1 s and more.
    ``thresholds`` are those of ``gc.set_threshold``, Python's own if there are none.
    """
    gc.collect()
    gc.freeze()
    if thresholds:
        gc.set_threshold(*thresholds)
