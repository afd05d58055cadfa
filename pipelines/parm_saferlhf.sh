#!/usr/bin/env bash
# PARM (arXiv 2505.06274) on PKU-SafeRLHF-10K: one autoregressive reward for all weights, beside GenARM's two, MOD and soups.
# usage:    pipelines/parm_saferlhf.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# fetches:  PKU-Alignment/alpaca-7b-reproduced, PKU-SafeRLHF-10K, beaver-7b-v1.0-reward and -cost, and two of Ray2333's GPT-2 rewards
#           (about 50 GB)
# needs:    a GPU of 80 GB; not run here. Five trainings of one or two epochs over 8,000 pairs, 44 x 500 greedy responses of 512 tokens
# expect:   OUT/compare/report.html: four fronts on 11 weights. The paper's table could not be read; one replication (65B, 300 prompts)
#           found most of PARM's points below GenARM's, and its hypervolume 0.62 to 0.86 of GenARM's by the choice of reference point
# as there: pairs labelled anew by Beaver's reward and cost, PBLoRA of rank 4 + 4 on q, k and v, Dirichlet(0.5) weights, beta 0.01,
#           rate 5e-4, 2 epochs of batches of 32, 11 weights, greedy, 512 tokens, base + 1 x reward
# not as in the released code: every row draws its own weights, the update stays factored, and weights come with the request; the base is
#           not in 4 bits; two rewards that labelled nothing score too, since Beaver's own say how well Beaver is imitated
source "$(dirname "$0")/common.sh"
if [ -n "$tiny" ]; then
  run tiny --out "$out/tiny"
  base=$out/tiny/model data=saferlhf:$out/tiny/saferlhf.jsonl shares='{train: 0.7, test: 0.3}'
  parm=(--reward.max_length 128 --reward.test_share 0.5 --reward.fit.batch_size 4 --reward.fit.max_steps 3 --reward.fit.learning_rate 1e-2)
  genarm=("${parm[@]}" --reward.lora.rank 2)
  dpo=(--dpo.lora.rank 2 --dpo.max_length 128 --dpo.test_share 0.5 --dpo.fit.batch_size 4 --dpo.fit.max_steps 3)
  drawn=(--sampling.max_new_tokens 8) rewards='[helpful=long,harmless=readable]' judges='[brief]' points=(--limit 4 --steps 2 --n_boot 50 --examples 1)
else
  base=$out/base data=saferlhf:PKU-Alignment/PKU-SafeRLHF-10K shares='{train: 0.85, test: 0.15}'
  fetch "$base" PKU-Alignment/alpaca-7b-reproduced
  parm=(--reward.max_length 1024 --reward.test_share 0.1 --reward.fit.learning_rate 5e-4 --reward.fit.batch_size 4
    --reward.fit.accumulate 8 --reward.fit.epochs 2 --reward.fit.weight_decay 0.05 --reward.fit.warmup 0.04
    --reward.fit.precision bfloat16 --reward.licence 'CC BY-NC 4.0 (PKU-SafeRLHF)')
  genarm=("${parm[@]}" --reward.lora.rank 8 --reward.lora.alpha 16 --reward.lora.targets '[q_proj,k_proj,v_proj]' --reward.fit.epochs 1)
  dpo=(--dpo.lora.rank 8 --dpo.lora.alpha 16 --dpo.lora.targets '[q_proj,k_proj,v_proj]' --dpo.beta 0.1 --dpo.max_length 1024
    --dpo.test_share 0.1 --dpo.fit.learning_rate 5e-5 --dpo.fit.batch_size 4 --dpo.fit.accumulate 8 --dpo.fit.weight_decay 0.05
    --dpo.fit.precision bfloat16)
  drawn=(--sampling.max_new_tokens 512 --sampling.top_k 0) points=(--limit 500 --steps 10)
  rewards='[helpful=field:beaver_reward,harmless=field:beaver_cost]'
  judges='[gpt2_helpful=field:helpful,gpt2_harmless=field:harmless]'
fi
policies="[helpful=$out/helpful/adapter,harmless=$out/harmless/adapter]"
guides="[helpful=$out/genarm-helpful/adapter,harmless=$out/genarm-harmless/adapter]"
train="[labelled:$out/pairs/train.jsonl]"

run label --out "$out/labelled" --pairs "[$data]" --rewards "$rewards"
run pairs --out "$out/pairs" --sources "[labelled:$out/labelled/pairs.jsonl]" --shares "$shares"
run train autoregressive --out "$out/parm" --model "$base" --pairs "$train" --reward.objectives '[helpful,harmless]' --reward.beta 0.01 \
  --reward.weighted.shared_rank 4 --reward.weighted.rank 4 --reward.weighted.alpha 8 "${parm[@]}"
for point in "helpful 0.5" "harmless 0.01"; do
  read -r name beta <<< "$point"
  run train autoregressive --out "$out/genarm-$name" --model "$base" --pairs "$train" --reward.objectives "[$name]" --reward.beta "$beta" \
    "${genarm[@]}"
  run train dpo --out "$out/$name" --model "$base" --pairs "$train" --dpo.objectives "[$name]" "${dpo[@]}"
done
run compare --out "$out/compare" --model "$base" --prompts "$out/pairs/prompts.jsonl" --split test "${points[@]}" \
  --methods "{PARM: {guides: [$out/parm/adapter]}, GenARM: {guides: $guides}, MOD: {mixing: $policies}, soup: {soup: $policies}}" \
  --rewards "$rewards" --judges "$judges" --samples 1 --reference_samples 1 --best_of '[]' --sampling.greedy true "${drawn[@]}"
