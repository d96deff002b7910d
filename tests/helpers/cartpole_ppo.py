"""Proximal policy optimisation in one file, for CartPole, or for any environment with a flat observation and a discrete
action: Schulman et al. 2017 (arXiv 1707.06347), in the style of CleanRL.

    python tests/helpers/cartpole_ppo.py --env-id CartPole-v1
"""

import argparse
import time

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

parser = argparse.ArgumentParser()
parser.add_argument("--env-id", default="CartPole-v1")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=100_000)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--num-envs", type=int, default=8)
parser.add_argument("--num-steps", type=int, default=128)
parser.add_argument("--gamma", type=float, default=0.99)
parser.add_argument("--gae-lambda", type=float, default=0.95)
parser.add_argument("--num-minibatches", type=int, default=4)
parser.add_argument("--update-epochs", type=int, default=4)
parser.add_argument("--clip-coef", type=float, default=0.2)
parser.add_argument("--ent-coef", type=float, default=0.01)
parser.add_argument("--vf-coef", type=float, default=0.5)
parser.add_argument("--max-grad-norm", type=float, default=0.5)
args = parser.parse_args()
batch_size = args.num_envs * args.num_steps
minibatch_size = batch_size // args.num_minibatches

torch.set_num_threads(1)
rng = np.random.default_rng(args.seed)
torch.manual_seed(args.seed)


def make_env():
    return gym.wrappers.RecordEpisodeStatistics(gym.make(args.env_id))


def layer(width_in, width_out, gain=2**0.5):
    linear = nn.Linear(width_in, width_out)
    nn.init.orthogonal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
    return linear


same_step = gym.vector.AutoresetMode.SAME_STEP
envs = gym.vector.SyncVectorEnv([make_env] * args.num_envs, autoreset_mode=same_step)
n_inputs = int(np.prod(envs.single_observation_space.shape))
n_actions = int(envs.single_action_space.n)
actor = nn.Sequential(layer(n_inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, n_actions, 0.01))
critic = nn.Sequential(layer(n_inputs, 64), nn.Tanh(), layer(64, 64), nn.Tanh(), layer(64, 1, 1.0))
parameters = [*actor.parameters(), *critic.parameters()]
optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5)

shape = (args.num_steps, args.num_envs)
obs = torch.zeros(*shape, n_inputs)
actions, log_probs, rewards, dones, values = torch.zeros(5, *shape)


def to_tensor(observation):
    return torch.as_tensor(observation, dtype=torch.float32).reshape(args.num_envs, n_inputs)


next_obs = to_tensor(envs.reset(seed=args.seed)[0])
next_done = torch.zeros(args.num_envs)
started = time.time()
for iteration in range(1, args.total_timesteps // batch_size + 1):
    returns_seen = []
    for step in range(args.num_steps):
        obs[step], dones[step] = next_obs, next_done
        with torch.no_grad():
            policy = Categorical(logits=actor(next_obs))
            action = policy.sample()
            values[step] = critic(next_obs)[:, 0]
        actions[step], log_probs[step] = action, policy.log_prob(action)
        observation, reward, terminated, truncated, info = envs.step(action.numpy())
        rewards[step] = torch.as_tensor(reward)
        next_obs, next_done = to_tensor(observation), torch.as_tensor(terminated | truncated, dtype=torch.float32)
        if "final_info" in info:
            returns_seen += info["final_info"]["episode"]["r"][info["_final_info"]].tolist()

    with torch.no_grad():
        next_value = critic(next_obs)[:, 0]
        advantages, last = torch.zeros(shape), torch.zeros(args.num_envs)
        for t in reversed(range(args.num_steps)):
            following = next_value if t == args.num_steps - 1 else values[t + 1]
            continues = 1.0 - (next_done if t == args.num_steps - 1 else dones[t + 1])
            delta = rewards[t] + args.gamma * following * continues - values[t]
            advantages[t] = last = delta + args.gamma * args.gae_lambda * continues * last
        targets = advantages + values

    flat = [x.flatten(0, 1) for x in (obs, actions, log_probs, advantages, targets)]
    for _ in range(args.update_epochs):
        for index in torch.from_numpy(rng.permutation(batch_size)).split(minibatch_size):
            b_obs, b_actions, b_log_probs, b_advantages, b_targets = (x[index] for x in flat)
            policy = Categorical(logits=actor(b_obs))
            ratio = (policy.log_prob(b_actions) - b_log_probs).exp()
            b_advantages = (b_advantages - b_advantages.mean()) / (b_advantages.std() + 1e-8)
            clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
            policy_loss = -torch.min(ratio * b_advantages, clipped * b_advantages).mean()
            value_loss = 0.5 * (critic(b_obs)[:, 0] - b_targets).square().mean()
            loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * policy.entropy().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()

    mean_return = np.mean(returns_seen) if returns_seen else float("nan")
    print(f"global_step={iteration * batch_size} episodic_return={mean_return:.3f} seconds={time.time() - started:.1f}")
envs.close()
