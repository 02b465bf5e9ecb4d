"""A network that looks at the words of a caption one by one: padding changes nothing, other captions do, a new one starts as
the network without, and frozen encoders are asked once for each caption.

Run: pytest tests/test_text_tokens.py
"""

import pytest
import torch
from test_text import PROMPTS, save_bert, save_t5

from video_diffusion import GaussianDiffusion, Trainer, Unet3D, checkpoint
from video_diffusion.data.shapes import make_shapes
from video_diffusion.distributed import Processes
from video_diffusion.networks.text import (
    BertEncoder,
    CaptionCache,
    T5Encoder,
    WordEncoder,
    caption_folder,
    text_encoder_from_config,
)

SMALL = dict(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, resnet_groups=4, cond_dim=16)


def small_unet(**config):
    torch.manual_seed(0)
    unet = Unet3D(**SMALL | dict(text_tokens=True) | config)
    for name, parameter in unet.named_parameters():
        if 'text_attention.attention.to_out' in name:          # starts at zero, so that nothing changes
            torch.nn.init.normal_(parameter, std=0.3)
    return unet.eval()


@pytest.fixture(scope='module')
def encoders(tmp_path_factory):
    bert, t5 = tmp_path_factory.mktemp('bert'), tmp_path_factory.mktemp('t5')
    return {'words': WordEncoder(16), 'bert': BertEncoder(save_bert(bert)), 't5': T5Encoder(save_t5(t5))}


# ---- encoders

@pytest.mark.parametrize('kind', ['words', 'bert', 't5'])
def test_tokens_are_the_words_and_their_mean_is_the_vector(encoders, kind):
    encoder = encoders[kind]
    tokens = encoder.tokens(PROMPTS)
    counts = (tokens != 0).any(-1).sum(1)                                     # BERT's end-of-text token is one of them
    assert counts.tolist() == [5 + (kind == 'bert'), 1 + (kind == 'bert'), 7 + (kind == 'bert')]
    assert tokens.shape == (3, counts.max(), encoder.dim) and tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.sum(1) / counts[:, None], encoder(PROMPTS))
    alone = encoder.tokens(PROMPTS[1:2])
    torch.testing.assert_close(alone, tokens[1:2, :alone.shape[1]], atol=1e-5, rtol=1e-5)
    assert kind != 'words' or encoder.tokens(['']).shape == (1, 0, 16)


def test_t5_is_frozen_loads_no_decoder_and_is_rebuilt_from_its_config(encoders):
    import transformers
    t5 = encoders['t5']
    whole = transformers.T5Model.from_pretrained(t5.name_or_path).eval()
    ids = t5.tokenizer(PROMPTS[:1], return_tensors='pt').input_ids
    torch.testing.assert_close(t5.tokens(PROMPTS[:1]), whole.encoder(ids).last_hidden_state)
    assert not any('decoder' in name for name in t5.transformer.state_dict())
    assert list(t5.parameters()) == [] and not t5.tokens(PROMPTS).requires_grad
    again = text_encoder_from_config(t5.config())
    assert type(again) is T5Encoder and torch.equal(again(PROMPTS), t5(PROMPTS))
    with pytest.raises(ValueError, match="pool='cls'.*has no CLS token"):
        T5Encoder(t5.name_or_path, pool='cls')


def test_bf16_weights_give_float_embeddings_close_to_those_of_float_weights(encoders):
    encoder = T5Encoder(encoders['t5'].name_or_path, dtype='bfloat16')
    assert next(encoder.transformer.parameters()).dtype == torch.bfloat16
    assert text_encoder_from_config(encoder.config()).dtype == 'bfloat16'
    ours, expected = encoder.tokens(PROMPTS), encoders['t5'].tokens(PROMPTS)
    assert ours.dtype == torch.float32 and 0 < (ours - expected).norm() < 0.03 * expected.norm()
    with pytest.raises(ValueError, match="dtype='float16': choose 'float32' or 'bfloat16'"):
        T5Encoder(encoders['t5'].name_or_path, dtype='float16')


@pytest.mark.parametrize('tokens', [True, False])
def test_a_cache_asks_once_and_changes_nothing(encoders, tokens):
    encoder, asked = encoders['bert'], []
    embed = encoder.tokens if tokens else encoder

    def counting(texts):
        asked.extend(texts)
        return embed(texts)
    cache = CaptionCache(counting)
    for texts in (PROMPTS, PROMPTS[::-1], PROMPTS[1:2] * 3):
        torch.testing.assert_close(cache(texts), embed(texts), atol=1e-5, rtol=1e-5)
    assert sorted(asked) == sorted(PROMPTS)
    first, other = cache(PROMPTS), CaptionCache(embed)
    other(PROMPTS[2:])
    assert torch.equal(first, other(PROMPTS))                                 # whoever stood beside it: the same bits


def test_a_full_cache_keeps_no_more(encoders):
    asked = []
    cache = CaptionCache(lambda texts: asked.extend(texts) or torch.ones(1, 4), limit=8)
    for _ in range(2):
        assert cache(['a', 'b', 'c']).shape == (3, 4)
    assert asked == ['a', 'b', 'c', 'c']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_cache_on_the_disk_outlives_its_encoder(encoders, tmp_path, dtype):
    encoder, asked = T5Encoder(encoders['t5'].name_or_path, dtype=dtype, length=5), []
    expected = CaptionCache(encoder.tokens)(PROMPTS)
    folder = caption_folder(encoder, tmp_path)
    cache = CaptionCache(lambda texts: asked.extend(texts) or encoder.tokens(texts), folder=folder)
    for texts in ({PROMPTS[0]}, set(PROMPTS), set(PROMPTS)):
        cache.fill(texts, Processes())
    assert sorted(asked) == sorted(PROMPTS)                                   # each once, whoever had been stopped before
    encoder.unload()
    assert not hasattr(encoder, 'transformer') and encoder.double() is encoder and encoder.config()['length'] == 5
    again = CaptionCache(encoder.tokens, folder=folder)(PROMPTS)
    assert torch.equal(again, expected) and again.dtype == torch.float32
    kept = {checkpoint.load(file).dtype for file in folder.iterdir()}
    assert kept == {getattr(torch, dtype)}                                    # in bf16 only what is


def test_other_encoders_have_another_place(encoders, tmp_path):
    one = T5Encoder(encoders['t5'].name_or_path, length=5)
    places = [caption_folder(one, tmp_path), caption_folder(T5Encoder(one.name_or_path, length=6), tmp_path)]
    next(one.transformer.parameters()).data[0, 0] += 1
    places.append(caption_folder(one, tmp_path))
    assert len(set(places)) == 3


# ---- the network

def test_padding_changes_nothing_and_each_word_something():
    unet = small_unet()
    x, time, cond = torch.randn(2, 3, 2, 8, 8), torch.tensor([5, 500]), torch.randn(2, 4, 16)
    out = unet(x, time, cond)
    padded = torch.cat([cond[:, :2], torch.zeros(2, 3, 16), cond[:, 2:]], dim=1)
    torch.testing.assert_close(unet(x, time, padded), out, atol=1e-5, rtol=1e-4)
    # With the same mean: the pooled vector does not tell these apart, only the tokens do.
    swapped = cond + torch.tensor([1., -1., 0., 0.])[:, None] * torch.randn(16)
    assert (unet(x, time, swapped) - out).abs().max() > 1e-3


def test_a_dropped_caption_is_as_good_as_any_other():
    unet = small_unet()
    x, time, cond = torch.randn(2, 3, 2, 8, 8), torch.tensor([5, 500]), torch.randn(2, 4, 16)
    mask = torch.tensor([True, False])
    one, other = unet(x, time, cond, null_cond_mask=mask), unet(x, time, cond[:, :1] * 7, null_cond_mask=mask)
    torch.testing.assert_close(one[0], other[0])
    assert (one[1] - other[1]).abs().max() > 1e-3
    assert unet(x, time, torch.zeros(2, 3, 16)).isfinite().all()              # empty captions


def test_a_new_network_starts_as_the_one_without_and_all_of_it_learns():
    plain, unet = Unet3D(**SMALL), Unet3D(**SMALL, text_tokens=True)
    left = unet.load_state_dict(plain.state_dict(), strict=False)
    assert not left.unexpected_keys and all('text_attention' in name or 'token' in name for name in left.missing_keys)
    x, time, cond = torch.randn(2, 3, 2, 8, 8), torch.tensor([5, 500]), torch.randn(2, 1, 16)
    torch.testing.assert_close(unet(x, time, cond), plain(x, time, cond[:, 0]))
    unet = small_unet().train()
    unet(x, time, cond, null_cond_mask=torch.tensor([True, False])).square().sum().backward()
    missing = [name for name, p in unet.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().sum() == 0)]
    assert not [name for name in missing if 'text_attention' in name or 'token' in name]


def test_bad_conditions_are_named():
    with pytest.raises(ValueError, match='text_tokens=True: give cond_dim'):
        Unet3D(dim=8, text_tokens=True)
    unet, x, time = small_unet(), torch.randn(2, 3, 2, 8, 8), torch.tensor([5, 500])
    for cond in (torch.randn(2, 16), torch.randn(2, 3, 15), torch.randn(3, 3, 16)):
        with pytest.raises(ValueError, match=r'expected \(2, tokens, 16\)'):
            unet(x, time, cond)


# ---- diffusion and trainer

def test_captions_become_tokens_in_training_and_sampling(encoders):
    torch.manual_seed(0)
    encoder = encoders['words']
    diffusion = GaussianDiffusion(small_unet(), image_size=8, num_frames=2, timesteps=10, text_encoder=encoder)
    loss = diffusion(torch.rand(2, 3, 2, 8, 8), cond=['a red ball', 'blue'])
    loss.backward()
    assert encoder.words.weight.grad.abs().sum() > 0
    encoder.zero_grad()
    sampling = dict(cond_scale=2., sampler='ddim', steps=2, seed=0, progress=False)
    ours = diffusion.sample(['a red ball', 'blue'], negative='the green one of many words', **sampling)
    expected = diffusion.sample(encoder.tokens(['a red ball', 'blue']).detach(),
                                negative=encoder.tokens(['the green one of many words']).detach(), **sampling)
    assert torch.equal(ours, expected)
    rebuilt = GaussianDiffusion.from_config(diffusion.config())
    assert rebuilt.denoise_fn.text_tokens and rebuilt.has_config(diffusion.config())


@pytest.mark.parametrize('kind', ['t5', 'words'])
def test_the_trainer_asks_a_frozen_encoder_once_for_each_caption(encoders, tmp_path, kind, monkeypatch):
    make_shapes(tmp_path / 'clips', count=6, image_size=16, num_frames=2)
    encoder, asked = encoders[kind], []
    states = encoder.states
    monkeypatch.setattr(encoder, 'states', lambda texts: asked.append(list(texts)) or states(texts))
    diffusion = GaussianDiffusion(small_unet(cond_dim=encoder.dim), image_size=8, num_frames=2, text_encoder=encoder)
    trainer = Trainer(diffusion, tmp_path / 'clips', train_batch_size=3, train_num_steps=4, gradient_accumulate_every=1,
                      save_and_sample_every=100, num_sample_rows=1, sampler='ddim', sample_steps=1, results_folder=tmp_path / 'r')
    monkeypatch.setattr(trainer, 'sample', lambda: None)
    trainer.train()
    captions = set(trainer.dataset.captions)
    if kind == 't5':
        assert sorted(text for texts in asked for text in texts) == sorted(captions)
    else:
        assert [len(texts) for texts in asked] == [3] * 4                     # it learns: what it says changes
