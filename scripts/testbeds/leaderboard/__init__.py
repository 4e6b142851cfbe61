"""Every rule of the library on every committed checkpoint of a testbed: accuracy kept, time of selection, needs."""
