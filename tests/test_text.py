"""Prompts to embeddings, with a two-layer BERT that the tests write themselves: nothing is downloaded.

    pytest tests/test_text.py
"""

import os
import socket
import subprocess
import sys
import zlib

import pytest
import torch
from torch import nn

from video_diffusion.networks.text import BertEncoder, WordEncoder, word_rows

PROMPTS = ['a red ball rolls left', 'blue', 'the blue square rolls right and left']
WORDS = 'a the red blue ball square rolls left right and'.split()


def save_bert(path, **config):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    vocabulary = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS]
    (path / 'vocab.txt').write_text('\n'.join(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, initializer_range=0.5, **config)        # large weights tell prompts apart
    transformers.BertModel(config).save_pretrained(path)
    return path


def save_t5(path):
    """An encoder-decoder whose tokenizer has no CLS token."""
    transformers = pytest.importorskip('transformers')
    from tokenizers import Tokenizer, models, pre_tokenizers
    ids = {word: index for index, word in enumerate(['<pad>', '</s>', '<unk>', *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token='<unk>'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token='<pad>', unk_token='<unk>').save_pretrained(path)
    transformers.T5Model(transformers.T5Config(
        vocab_size=len(ids), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).save_pretrained(path)
    return path


@pytest.fixture(scope='module')
def bert_dir(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp('bert'))


def run_python(code, **environment):
    done = subprocess.run([sys.executable, '-c', code], env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, check=True)
    return done.stdout.strip()


# words

def test_word_encoder_is_the_mean_of_the_rows_of_its_words():
    encoder = WordEncoder(dim=8, buckets=100)
    rows = [zlib.crc32(word) % 100 for word in (b'a', b'red', b'ball')]
    embedding = encoder(['A red, BALL!', 'red'])
    assert embedding.shape == (2, 8) and embedding.dtype == torch.float32
    torch.testing.assert_close(embedding[0], encoder.words.weight[rows].mean(dim=0))
    torch.testing.assert_close(embedding[1], encoder.words.weight[rows[1]])


def test_words_are_letters_and_digits():
    assert word_rows('Two  balls_2;\tÉté!', 4096) == [zlib.crc32(word.encode()) % 4096
                                                      for word in ('two', 'balls', '2', 'été')]


def test_word_encoder_does_not_know_word_order():
    encoder = WordEncoder()
    torch.testing.assert_close(encoder(['red ball, blue box']), encoder(['blue ball, red box']))


def test_empty_prompt_is_zeros():
    encoder = WordEncoder(dim=8)
    assert torch.equal(encoder(['', ' ?!']), torch.zeros(2, 8))
    embedding = encoder(['', 'red'])
    assert torch.equal(embedding[0], torch.zeros(8)) and embedding[1].abs().sum() > 0


@pytest.mark.slow
def test_word_rows_are_the_same_in_every_process():
    code = 'from video_diffusion.networks.text import word_rows; print(word_rows("a red ball rolls left", 4096))'
    another_seed = '2' if os.environ.get('PYTHONHASHSEED') == '1' else '1'
    assert run_python(code, PYTHONHASHSEED=another_seed) == str(word_rows('a red ball rolls left', 4096))


def test_gradients_reach_the_rows_of_the_words_and_no_others():
    encoder = WordEncoder(dim=4)
    encoder(PROMPTS).sum().backward()
    touched = encoder.words.weight.grad.abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == sorted(set(sum((word_rows(text, 4096) for text in PROMPTS), [])))


def test_five_words_have_unit_variance():
    torch.manual_seed(0)
    assert abs(WordEncoder(dim=4096)(['a red ball rolls left']).var().item() - 1) < 0.1


def test_word_encoder_refuses_sizes_below_one():
    for sizes in ({'dim': 0}, {'buckets': 0}):
        with pytest.raises(ValueError, match='must be 1 or more'):
            WordEncoder(**sizes)


# BERT

@pytest.mark.parametrize('pool', ['mean', 'cls'])
def test_bert_embedding_equals_that_of_video_diffusion_pytorch(bert_dir, monkeypatch, pool):
    peer = pytest.importorskip('video_diffusion_pytorch.text')
    encoder = BertEncoder(bert_dir, pool)
    monkeypatch.setattr(peer, 'MODEL', encoder.transformer)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)      # the peer would move its input there
    token_ids = encoder.tokenizer(PROMPTS, padding=True, return_tensors='pt').input_ids
    expected = peer.bert_embed(token_ids, return_cls_repr=pool == 'cls')
    embedding = encoder(PROMPTS)
    assert embedding.shape == (3, encoder.dim) == (3, 32) and embedding.dtype == torch.float32
    torch.testing.assert_close(embedding, expected)


@pytest.mark.parametrize('pool', ['mean', 'cls', 'words'])
def test_a_prompt_alone_equals_the_prompt_beside_longer_ones(bert_dir, pool):
    encoder = WordEncoder() if pool == 'words' else BertEncoder(bert_dir, pool)
    together = encoder(PROMPTS)
    alone = torch.cat([encoder([text]) for text in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert torch.pdist(alone).min() > 0.1               # and different prompts are told apart


def test_bert_is_frozen_and_always_in_eval_mode(bert_dir):
    encoder = nn.ModuleDict({'text': BertEncoder(bert_dir)}).train().requires_grad_()['text']
    assert not any(parameter.requires_grad for parameter in encoder.transformer.parameters())
    embedding = encoder(PROMPTS)
    assert not embedding.requires_grad
    assert torch.equal(embedding, encoder(PROMPTS))     # no dropout (the tiny BERT has 0.1)


def test_bert_stays_out_of_checkpoints_but_follows_its_module(bert_dir):
    encoder = BertEncoder(bert_dir)
    model = nn.ModuleDict({'text': encoder, 'unet': nn.Linear(2, 2)})
    assert encoder.state_dict() == {} and list(encoder.parameters()) == []
    assert list(model.state_dict()) == ['unet.weight', 'unet.bias']
    model.load_state_dict(model.state_dict())           # strict

    before = encoder(PROMPTS)
    model.to(torch.float64)
    after = encoder(PROMPTS)
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before)
    model.to('meta')
    assert encoder.transformer.device.type == 'meta'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('kind', ['words', 'bert'])
def test_embeddings_on_the_gpu_equal_those_on_the_cpu(bert_dir, kind):
    encoder = WordEncoder() if kind == 'words' else BertEncoder(bert_dir)
    on_cpu = encoder(PROMPTS)
    on_gpu = encoder.to('cuda')(PROMPTS)
    assert on_gpu.device.type == 'cuda'
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-3, rtol=1e-3)


def test_constructor_arguments_rebuild_the_encoder(bert_dir, tmp_path):
    encoder = BertEncoder(bert_dir, pool='cls')
    torch.save({'name_or_path': encoder.name_or_path, 'pool': encoder.pool}, tmp_path / 'arguments.pt')
    rebuilt = BertEncoder(**torch.load(tmp_path / 'arguments.pt', weights_only=True))
    assert torch.equal(rebuilt(PROMPTS), encoder(PROMPTS))


def test_a_directory_on_disk_needs_no_network(bert_dir, monkeypatch):
    asked = []

    def refuse(*arguments, **options):
        asked.append(arguments)
        raise OSError('no network here')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    BertEncoder(bert_dir)(PROMPTS)
    assert asked == []


def test_long_prompts_are_cut_at_what_the_model_can_read(tmp_path):
    encoder = BertEncoder(save_bert(tmp_path, max_position_embeddings=8))
    assert encoder.max_tokens == 8                      # [CLS], six words, [SEP]
    torch.testing.assert_close(encoder(['red ' * 6 + 'blue ball']), encoder(['red ' * 6]))


def test_models_that_count_positions_from_that_of_padding_read_less(tmp_path):
    """RoBERTa: 12 positions, of which no token has the first two."""
    transformers = pytest.importorskip('transformers')
    save_bert(tmp_path)
    config = transformers.RobertaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                        max_position_embeddings=12, pad_token_id=1)
    transformers.RobertaModel(config).save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(tmp_path / 'vocab.txt'), model_max_length=512).save_pretrained(tmp_path)
    encoder = BertEncoder(tmp_path)
    assert encoder.max_tokens == 10 and encoder(['red ' * 30]).isfinite().all()


def test_half_precision_weights_give_float_embeddings(bert_dir, tmp_path):
    encoder = BertEncoder(bert_dir)
    encoder.tokenizer.save_pretrained(tmp_path)
    encoder.transformer.half().save_pretrained(tmp_path)
    assert BertEncoder(tmp_path)(PROMPTS).dtype == torch.float32


def test_t5_without_a_cls_token(tmp_path):
    encoder = BertEncoder(save_t5(tmp_path))
    states = encoder.transformer(**encoder.tokenizer(['red ball'], return_tensors='pt')).last_hidden_state
    torch.testing.assert_close(encoder(['red ball', 'the blue ball rolls'])[0], states[0].mean(dim=0))
    with pytest.raises(ValueError, match='has no CLS token'):
        BertEncoder(tmp_path, pool='cls')


# errors

@pytest.mark.parametrize('texts', ['a red ball', [], [1, 2], ['red', None], None, torch.zeros(2, 3)])
def test_what_is_not_a_list_of_strings_is_refused(bert_dir, texts):
    for encoder in (WordEncoder(), BertEncoder(bert_dir)):
        with pytest.raises(ValueError, match='give a list of strings'):
            encoder(texts)


def test_a_tuple_of_strings_is_a_list_of_strings(bert_dir):
    """The DataLoader collates strings to either, depending on the data set."""
    for encoder in (WordEncoder(), BertEncoder(bert_dir)):
        assert torch.equal(encoder(tuple(PROMPTS)), encoder(PROMPTS))


def test_unknown_pool_is_refused(bert_dir):
    with pytest.raises(ValueError, match="pool='max'"):
        BertEncoder(bert_dir, pool='max')


def test_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)      # makes `import transformers` fail
    with pytest.raises(ImportError, match=r'pip install "video_diffusion\[text\]"'):
        BertEncoder('anything')


def test_an_unreachable_model_is_named(tmp_path, monkeypatch):
    pytest.importorskip('transformers')
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    (tmp_path / 'empty').mkdir()
    for name in ('nobody/no-such-bert', str(tmp_path / 'absent'), str(tmp_path / 'empty')):
        with pytest.raises(ValueError, match='give a directory on disk') as error:
            BertEncoder(name)
        assert name in str(error.value)


def test_a_model_without_its_vocabulary_is_refused(tmp_path):
    (save_bert(tmp_path) / 'vocab.txt').unlink()
    with pytest.raises(ValueError, match='holds no vocabulary'):
        BertEncoder(tmp_path)


@pytest.mark.slow
def test_importing_the_library_does_not_import_transformers():
    assert run_python('import sys, video_diffusion.networks.text; print("transformers" in sys.modules)') == 'False'
