"""The examples of loops without Lightning's Trainer, and of manual optimization."""

import sys

from examples import fabric, gan, plain_loop


def test_plain_loop_freezes_and_resumes_to_the_bit(capsys):
    plain_loop.main()
    said = capsys.readouterr().out
    assert "90% of the elements froze after step 20" in said
    assert "the same to the bit" in said


def test_fabric_example_freezes_nine_tenths(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fabric"])
    fabric.main()
    assert "epoch 1" in (said := capsys.readouterr().out)
    assert "90% frozen" in said


def test_gan_freezes_each_network_by_its_own_callback(capsys):
    gan.main(steps=40)
    said = capsys.readouterr().out
    assert "generator: 80% frozen" in said
    assert "critic: 50% frozen" in said
