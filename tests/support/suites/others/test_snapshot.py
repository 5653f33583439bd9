def test_snapshot(snapshot):
    snapshot.assert_match("some text\n", "text.txt")


def test_folder(snapshot):
    snapshot.snapshot_dir = "kept/snapshots"
    snapshot.assert_match_dir({"a.txt": "a\n", "b": {"c.txt": "c\n"}}, "tree")
