from reference import Reference, gnu_tar
from tartapefs import Tape, TapePlayer, TapeRecorder
def test_a(tree, mount):
    TapeRecorder(tree).commit()
    ref=Reference(tree)
    with Tape.discover(tree) as tape:
        p=TapePlayer(tape)
        assert p.read(0,tape.total_size)==ref.read(0,ref.size)==gnu_tar(tree)
        p.close()
    assert mount(tree).read_bytes()==ref.read(0,ref.size)
