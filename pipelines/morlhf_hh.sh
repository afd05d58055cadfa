#!/usr/bin/env bash
# MORLHF by PPO on HH-RLHF's prompts, in the setting of Rewards-in-Context (arXiv 2402.10207): one training per weighting of helpful and harmless.
# usage:    pipelines/morlhf_hh.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  meta-llama/Llama-2-7b-hf (its licence has to be accepted), Anthropic/hh-rlhf, two of Ray2333's GPT-2 rewards (about 20 GB)
# needs:    a GPU of 80 GB; not run here. An SFT of one epoch, then three trainings of 20,000 responses of 128 tokens
# expect:   OUT/compare/report.html: three points of MORLHF, beside best-of-n of the same SFT model
# as there: one SFT model; LoRA 64/128 on q and v; Adam, 1e-5; rounds of 64 prompts with one response's worth of steps each; clip 0.2, lambda
#           0.95, gradient norms up to 0.5; the KL in the reward, adaptive, 0.2 at first, aiming at 3 nats with a horizon of 10,000; 128 tokens
# not as there: rewards are standardised on the SFT model's own responses before they are weighed (raw and rounded to 0.1 there, so
#           that a weight means something else for every pair of rewards); responses are drawn at temperature 1 from all tokens, and
#           the KL is of that law (0.7 there, which makes the estimate of the KL biased); pad isn't EOS
source "$(dirname "$0")/common.sh"
source "$here/hh_sft.bash"
weightings=(0.25 0.5 0.75)
if [ -n "$tiny" ]; then
  points=(--limit 4 --n_boot 50 --examples 1) tokens=8
  loop=(--loop.rounds 2 --loop.prompts 4 --loop.samples 2 --loop.steps 2 --loop.lora.rank 2)
else
  points=(--limit 200) tokens=128
  loop=(--loop.rounds 156 --loop.prompts 64 --loop.samples 2 --loop.steps 4 --loop.lora.rank 64 --loop.lora.alpha 128
    --loop.lora.targets '[q_proj,v_proj]' --loop.beta 0.2 --loop.fit.learning_rate 1e-5 --loop.fit.schedule constant --loop.fit.warmup 0
    --loop.fit.batch_size 4 --loop.fit.accumulate 4 --loop.fit.clip 0.5 --loop.fit.precision bfloat16)
fi
ppo=(--ppo.advantage gae --ppo.kl_target 3 --ppo.kl_horizon 10000)

own_scale "$tokens"
policies=()
for weight in "${weightings[@]}"; do
  run train ppo --out "$out/ppo-$weight" --model "$base" --prompts "$out/prompts/prompts.jsonl" --rewards "$rewards" \
    --statistics "$out/statistics.json" --loop.weights "$weight,$(LC_ALL=C awk "BEGIN { print 1 - $weight }")" \
    --loop.sampling.max_new_tokens "$tokens" "${loop[@]}" "${ppo[@]}"
  policies+=("$out/ppo-$weight/adapter")
done
run compare --out "$out/compare" --model "$base" --prompts "$out/prompts/prompts.jsonl" --split test "${points[@]}" \
  --methods "{MORLHF: {policies: [$(IFS=,; echo "${policies[*]}")]}}" --rewards "$rewards" --judges '[]' \
  --samples 1 --reference_samples 2 --best_of '[2]' --sampling.max_new_tokens "$tokens"
