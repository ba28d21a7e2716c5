"""The passes that ship with qcompiler: one file, one pass."""

if __name__ != "qcompiler.passes":  # imported as top-level `passes`: each class would exist twice
    raise ImportError("import these as `qcompiler.passes`, not as `passes`")
