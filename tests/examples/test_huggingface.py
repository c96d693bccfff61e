"""The example for the Trainer of transformers, as it is."""

from examples import huggingface


def test_example_freezes_and_resumes_to_the_bit(capfd):
    """As its last line says."""
    huggingface.main()
    printed = capfd.readouterr().out
    assert "90% of the eligible elements froze after step 10" in printed
    assert "Resumed after step 20, the weights are the same to the bit." in printed
