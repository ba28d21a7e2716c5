"""The backends that ship with qcompiler: one file or folder, one backend."""

if (
    __name__ != "qcompiler.backends"
):  # imported as top-level `backends`: each class would exist twice
    raise ImportError("import these as `qcompiler.backends`, not as `backends`")
