"""The VAE's losses are their formulas, can be added up from parts, and the critic sees pictures and motion; PSNR and SSIM too.

Run: pytest tests/test_vae_loss.py
"""

import math

import pytest
import torch

from video_diffusion.distributed import Processes
from video_diffusion.vae.gaussian import DiagonalGaussian
from video_diffusion.vae.metrics import psnr, ssim
from video_diffusion.vae.vae_loss import Discriminator, PerceptualLoss, VAELoss, adaptive_weight, discriminator_loss, generator_loss


def clip(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def example(frames=5):
    video, again = clip(2, 3, frames, 8, 8), clip(2, 3, frames, 8, 8, seed=1)
    return video, again, DiagonalGaussian(clip(2, 4, frames, 4, 4, seed=2), -clip(2, 4, frames, 4, 4, seed=3))


# The terms

@pytest.mark.parametrize('kind', ['l1', 'l2'])
def test_error_and_kl_are_their_formulas(kind):
    video, again, posterior = example()
    nll, error, kl = VAELoss(kind)(video, again, posterior, frames=5)
    expected = (video - again).abs().mean() if kind == 'l1' else (video - again).square().mean()
    torch.testing.assert_close(error, expected)
    torch.testing.assert_close(nll, expected)
    m, v = posterior.mean, posterior.logvar.exp()
    torch.testing.assert_close(kl, 0.5 * (m ** 2 + v - 1 - v.log()).sum() / video.numel())


def test_a_learnt_log_variance_finds_the_size_of_the_error():
    video, again, posterior = example()
    loss = VAELoss('l2', learn_logvar=True)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(200):
        nll, error, _ = loss(video, again, posterior, frames=5)
        optimizer.zero_grad()
        nll.backward()
        optimizer.step()
    assert loss.logvar.item() == pytest.approx(math.log(error.item()), abs=0.02)  # where error / exp(s) + s is least
    assert nll.item() == pytest.approx(1 + math.log(error.item()), abs=0.01)
    assert not VAELoss().logvar.requires_grad


def test_shares_of_a_clip_average_to_the_whole(vgg):
    video, again, posterior = example()
    loss = VAELoss('l1', learn_logvar=True, perceptual=PerceptualLoss(vgg))
    loss.logvar.data.fill_(-2.)
    video, again, posterior = clip(1, 3, 5, 16, 16), clip(1, 3, 5, 16, 16, seed=1), posterior
    whole = loss(video, again, posterior, frames=5)
    parts = []
    for frames in (slice(0, 3), slice(3, 5), slice(5, 5)):
        part = DiagonalGaussian(posterior.mean[:, :, frames], posterior.logvar[:, :, frames])
        parts.append(loss(video[:, :, frames], again[:, :, frames], part, frames=5 / 3))
    for expected, *values in zip(whole, *parts):
        torch.testing.assert_close(sum(values) / 3, expected)
    scores = clip(2, 1, 5, 2, 2) * 4 - 2
    for function in (lambda s, n: generator_loss(s, n), lambda s, n: discriminator_loss(s, -s * 0.7, n)):
        values = [function(scores[:, :, frames], 5 / 3) for frames in (slice(0, 3), slice(3, 5), slice(5, 5))]
        torch.testing.assert_close(sum(values) / 3, function(scores, 5))


def test_hinge_losses():
    real, fake = torch.tensor([2., 0.]).view(1, 1, 2, 1, 1), torch.tensor([-3., 0.5]).view(1, 1, 2, 1, 1)
    assert discriminator_loss(real, fake, 2).item() == pytest.approx((0 + 1 + 0 + 1.5) / 2 / 2)
    assert generator_loss(fake, 2).item() == pytest.approx(1.25)


def test_the_adaptive_weight_is_a_ratio_of_gradient_norms_and_clamped():
    layer = torch.tensor([3., 4.], requires_grad=True)
    nll, adversarial = layer.square().sum(), 0.5 * layer.sum()       # gradients (6, 8) and (0.5, 0.5)
    weight = adaptive_weight(nll, adversarial, layer)
    assert weight.item() == pytest.approx(10 / (0.5 * math.sqrt(2)), rel=1e-3) and not weight.requires_grad
    assert adaptive_weight(nll, 0 * adversarial, layer, largest=50.).item() == 50.
    # The average over processes: here two processes, the other one with three times our gradients.
    assert adaptive_weight(nll, adversarial.square(), layer, average=lambda g: g * 2).item() == pytest.approx(
        10 / (3.5 * math.sqrt(2)), rel=1e-3)
    assert adaptive_weight(torch.zeros((), requires_grad=True) * 1, adversarial, layer).item() == 0   # no frames here


class HalfLayer(torch.nn.Module):
    """A last layer as autocast runs it in fp16, and two losses, each a mean over so many values that its gradients vanish."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 5) * 0.1)
        self.x, self.to = torch.randn(40, 5), torch.randn(40, 3)

    def losses(self, dtype, divisor=1e9):
        y = torch.nn.functional.linear(self.x.to(dtype), self.weight.to(dtype)).float()
        return (y - self.to).square().sum() / divisor, y.tanh().sum() / divisor


def test_the_adaptive_weight_in_fp16_is_that_in_float32():
    layer = HalfLayer()
    expected = adaptive_weight(*layer.losses(torch.float32), layer.weight).item()
    assert adaptive_weight(*layer.losses(torch.float16), layer.weight).item() == 0          # what scale is there for
    weight = adaptive_weight(*layer.losses(torch.float16), layer.weight, scale=torch.tensor(2. ** 26))
    assert weight.item() == pytest.approx(expected, rel=1e-2) and expected > 1e-4
    assert adaptive_weight(*layer.losses(torch.float32), layer.weight, scale=2. ** 26).item() == pytest.approx(expected)
    too_large = adaptive_weight(*layer.losses(torch.float16), layer.weight, scale=torch.tensor(2. ** 50))
    assert too_large.isnan()                                     # its gradients are not finite, so a GradScaler leaves out the step


def test_the_adaptive_weight_does_not_wait_for_the_device():
    """A tensor on the meta device has no numbers: whoever asks for them, by item() or cpu(), gets an error."""
    layer = torch.ones(2, 3, device='meta', requires_grad=True)
    weight = adaptive_weight(layer.square().sum(), layer.sum(), layer, average=Processes().mean, scale=layer.detach().sum())
    assert weight.is_meta and weight.shape == ()


# The critic

def test_the_critic_scores_the_first_frame_as_a_picture_and_later_ones_with_their_past():
    critic = Discriminator(dim=8, levels=2).eval()
    video = clip(1, 3, 6, 16, 16)
    scores = critic(video)
    assert scores.shape == (1, 1, 6, 4, 4)
    torch.testing.assert_close(critic(video[:, :, :1]), scores[:, :, :1])
    later = video.clone()
    later[:, :, 3:] = 0
    torch.testing.assert_close(critic(later)[:, :, :3], scores[:, :, :3])
    assert (critic(later) - scores)[:, :, 5].abs().max() > 1e-3      # each frame itself is judged, too
    shuffled = critic(video[:, :, [2, 1, 0, 3, 4, 5]])
    assert (shuffled - scores)[:, :, 3].abs().max() > 1e-4          # the same frame after another past
    empty = critic(video[:, :, :0])                                  # the share of a process without frames
    assert empty.numel() == 0 and empty.requires_grad


def test_a_critic_learns_to_tell_a_blurred_clip():
    torch.manual_seed(0)
    critic = Discriminator(dim=8, levels=1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for step in range(40):
        real = clip(2, 3, 2, 8, 8, seed=step).round()
        fake = torch.nn.functional.avg_pool3d(real, (1, 3, 3), 1, (0, 1, 1))
        loss = discriminator_loss(critic(real), critic(fake), 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2


# The perceptual loss

@pytest.fixture(scope='module')
def vgg(tmp_path_factory):
    from torchvision.models.vgg import cfgs, make_layers
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('vgg') / 'vgg16.pth'
    state = make_layers(cfgs['D']).state_dict()                    # without the classifier, nine tenths of it
    torch.save({f'features.{name}': value for name, value in state.items()}, path)
    return path


@pytest.mark.slow
def test_the_perceptual_loss_is_the_distance_of_unit_features(vgg):
    from torchvision.models import vgg16
    network = vgg16(weights=None)
    network.load_state_dict(torch.load(vgg, weights_only=True), strict=False)
    a, b = clip(2, 3, 2, 16, 16), clip(2, 3, 2, 16, 16, seed=1)
    expected = 0.
    for i in range(2):
        for f in range(2):
            x, y = (torch.stack([(v[i, c, f] - m) / s for c, (m, s) in enumerate(
                zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))])[None] for v in (a, b))
            for n, layer in enumerate(network.features[:30]):
                x, y = layer(x), layer(y)
                if n in (3, 8, 15, 22, 29):
                    d = x / x.norm(dim=1, keepdim=True) - y / y.norm(dim=1, keepdim=True)
                    expected += d.square().sum(1).mean().item()
    loss = PerceptualLoss(vgg)
    assert loss(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert loss(a, a).item() == 0
    b.requires_grad_()
    loss(a, b).backward()
    assert b.grad.abs().max() > 0 and not any(p.requires_grad for p in loss.features.parameters())
    assert list(VAELoss(perceptual=loss).state_dict()) == ['logvar']           # not in any checkpoint


def test_a_perceptual_loss_without_weights_says_where_they_are(tmp_path):
    with pytest.raises(FileNotFoundError, match='vgg16-397923af.pth'):
        PerceptualLoss(tmp_path / 'none.pth')
    with pytest.raises(TypeError, match="'weights'"):                          # there is no default that could work
        PerceptualLoss()
    torch.save({'features.0.weight': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='other.pth .*VGG16.* does not fit.*missing'):
        PerceptualLoss(tmp_path / 'other.pth')
    with pytest.raises(ValueError, match="loss='huber': give one of 'l1', 'l2'"):
        VAELoss('huber')
    for weight in (-1., math.nan, math.inf):
        with pytest.raises(ValueError, match='perceptual_weight='):
            VAELoss(perceptual_weight=weight)


@pytest.mark.parametrize('shape, sees', [((1, 1, 2, 16, 16), True), ((1, 3, 1, 16, 17), True), ((1, 4, 2, 16, 16), False),
                                         ((1, 3, 2, 15, 16), False), ((1, 3, 2, 16, 8), False)])
def test_the_perceptual_loss_says_which_videos_it_can_see(vgg, shape, sees):
    loss, video = PerceptualLoss(vgg), clip(*shape)
    if sees:
        assert loss(video, 1 - video).item() > 0
    else:
        with pytest.raises(ValueError, match=f'{shape[1]} channels of {shape[3]}x{shape[4]} pixels: VGG16 sees'):
            loss(video, video)


def test_a_reconstruction_of_other_channels_is_not_broadcast():
    video, again, posterior = example()
    with pytest.raises(ValueError, match='out_channels'):
        VAELoss()(video, again[:, :1], posterior, frames=5)


# PSNR and SSIM

def test_psnr_is_its_formula():
    video = torch.zeros(2, 3, 2, 8, 8)
    again = video.clone()
    again[0] += 0.1
    again[1] += 0.01
    assert psnr(video, again).tolist() == pytest.approx([20., 40.], abs=1e-4)


def test_ssim_is_its_formula_in_every_window():
    a, b = clip(2, 1, 2, 13, 12).double(), clip(2, 1, 2, 13, 12, seed=1).double()
    b = 0.7 * a + 0.3 * b
    window = torch.tensor([[math.exp(-((y - 5) ** 2 + (x - 5) ** 2) / (2 * 1.5 ** 2)) for x in range(11)] for y in range(11)],
                          dtype=torch.float64)
    window /= window.sum()
    for i in range(2):
        values = []
        for f in range(2):
            for y in range(3):
                for x in range(2):
                    p, q = (v[i, 0, f, y:y + 11, x:x + 11] for v in (a, b))
                    mp, mq = (window * p).sum(), (window * q).sum()
                    vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
                    cov = (window * (p - mp) * (q - mq)).sum()
                    values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
        assert ssim(a, b)[i].item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-9)
    assert ssim(a, a).tolist() == pytest.approx([1., 1.])
    with pytest.raises(ValueError, match='11 or more'):
        ssim(a[..., :10], b[..., :10])
