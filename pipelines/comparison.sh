#!/usr/bin/env bash
# Twenty ways on SmolLM2 between helpful, harmless and positive: the same prompts, rewards, KL and compute, two objectives and three.
# Everything is learnt from the model's own answers to 640 prompts of HH-RLHF, scored by the package's rewards; nothing but the comparison
# meets the test prompts. Three objectives are compared at the corners, between each two and in the middle; each two of them are compared on
# the points that give the third no weight.
# usage:    [HH=FOLDER] pipelines/comparison.sh [--tiny] [--list] [OUT]        a killed run continues when it is run again
# needs:    helpful-base and harmless-base of HH-RLHF (MIT) as FOLDER/NAME.test.jsonl.gz, by default ../shared/data/hh_rlhf
# takes:    about 5 hours on 2 CPU cores, 9 GiB; the 105 points 65 minutes of it
# expect:   OUT/compare/table.md: README's table in "Comparing methods"; report.html
source "$(dirname "$0")/common.sh"
third=positive
[ -z "$tiny" ] || third=relevant
source "$here/own_answers.bash"
half="$first=0.5,$second=0.5" middle="$first=0.3334,$second=0.3333,$third=0.3333"
if [ -n "$tiny" ]; then
  value=(--value.calibration_states 16 --value.state_features 2 --value.token_features 4)
  scorer=(--reward.fit.max_steps 2 --reward.test_share 0.3 --reward.layers 1 --reward.lora.rank 2 --reward.lora.blocks 1)
  trees=(--limit 6 --growth.layers 3 --shard 3)
  model_of_values=(--value.validation_share 0.34 --value.calibration_states 16 --value.fit.max_steps 2 --value.lora.rank 2)
  rounds=(--loop.rounds 2 --loop.prompts 4 --loop.samples 2 --loop.steps 2 --loop.sampling.max_new_tokens 8)
  ppo=(--loop.lora.rank 2) dpo_online=(--loop.weighted.rank 2 --loop.weighted.shared_rank 2)
  offline=(--sft.test_share 0.1 --sft.lora.rank 2 --sft.fit.max_steps 2) again=(--ric.replay_rows 8) goals=(--limit 8)
  guides=(--reward.fit.max_steps 3) genarm=("${guides[@]}" --reward.lora.rank 2) held_out='[readable]' more=+0.01sd
  points=(--limit 4 --reference_samples 4 --best_of '[2,4]' --n_boot 50 --examples 1) segment='shortest: 2, longest: 4, tries: 3'
else
  judges='[judge_helpful,judge_harmless,relevant]' held_out='[helpful,harmless,positive,judge_helpful,judge_harmless]'
  value=() scorer=(--reward.max_length 192 --reward.test_share 0.1 --reward.fit.epochs 1) trees=(--limit 40 --growth.layers 4)
  model_of_values=(--value.fit.epochs 1 --value.fit.learning_rate 2e-4 --value.lora.rank 16 --value.lora.alpha 32)
  rounds=(--loop.rounds 12) ppo=() dpo_online=()
  offline=(--sft.fit.precision bfloat16) goals=(--limit 240 --seed 5)
  again=(--ric.replay_rows 240 --sft.fit.max_steps 40 --sft.fit.learning_rate 2e-4)
  dpo+=(--dpo.fit.precision bfloat16) dpo_first+=(--dpo.fit.precision bfloat16) guides=(--reward.fit.precision bfloat16)
  genarm=(--reward.beta 0.1 --reward.test_share 0.1 --reward.fit.max_steps 36 --reward.fit.batch_size 16 --reward.fit.checkpoint_every 12)
  conflicts=24 select=(--margin -0.5) # at 0 none of 24 conflicts of three objectives has an answer that all policies prefer to both
  points=(--workers 2 --limit 40) more=+0.4sd segment='shortest: 8, longest: 16, tries: 8'
fi
run normalise --run "$out/bank" --out "$out/scale.json"

# A reward of the objective $1 that reads the whole of a response that has begun (ARGS): OUT/scorer-OBJECTIVE/model.
scorer() {
  run train bradley_terry --config "$here/../recipes/helpful-reward.yaml" --model "$model" --pairs "$pairs" \
    --reward.objective "$1" "${scorer[@]}" --out "$out/scorer-$1"
}

# Trees of the reference and a model of their nodes' values: OUT/value-model.
value_model() {
  run grow --config "$here/../recipes/grow.yaml" "${asked[@]}" "${sampling[@]}" "${trees[@]}" --out "$out/trees"
  run label nodes --config "$here/../recipes/label-nodes.yaml" --model "$model" --trees "$out/trees" --rewards "$rewards" --out "$out/nodes"
  run train value_model --config "$here/../recipes/value-model.yaml" --labels "$out/nodes" "${model_of_values[@]}" --out "$out/value-model"
}

# Policies that learn online, by OUT/scale.json: `morlhf NAME WEIGHTS` OUT/morlhf-NAME/adapter, `online_dpo` OUT/online-dpo/adapter.
on_policy() { # a recipe goes before the options that differ from it
  local method=$1 recipe=$2
  shift 2
  run train "$method" --config "$here/../recipes/$recipe.yaml" "${asked[@]}" --rewards "$rewards" --statistics "$out/scale.json" "${rounds[@]}" "$@"
}
morlhf() { on_policy ppo morlhf "${ppo[@]}" --loop.weights "$2" --out "$out/morlhf-$1"; }
online_dpo() { on_policy online_dpo online-dpo "${dpo_online[@]}" --out "$out/online-dpo"; }

# Rewards-in-context on the bank and a round of its own, by OUT/scale.json: OUT/ric-online.
in_context() {
  local ric=(--config "$here/../recipes/ric.yaml" --normalisation "$out/scale.json")
  run train ric "${ric[@]}" --runs "[$out/bank]" --model "$model" "${offline[@]}" --out "$out/ric"
  run sample --in_context "$out/ric" --goals simplex "${asked[@]}" --split train --samples 1 "${goals[@]}" "${sampling[@]}" --out "$out/round"
  run score --run "$out/round" --model "$model" --rewards "$rewards"
  run train ric "${ric[@]}" --runs "[$out/round]" --replay "[$out/bank]" --ric.selection.by any_quantile --model "$out/ric/adapter" \
    "${offline[@]}" "${again[@]}" --out "$out/ric-online"
}

from_pairs() {
  policies
  run train modpo --model "$model" --pairs "$pairs" --dpo.objectives "[$second]" --modpo.margins "['$first=dpo:$out/$first/adapter']" \
    --modpo.weights "$half" "${dpo_first[@]}" --out "$out/modpo-half"
  run train modpo --model "$model" --pairs "$pairs" --dpo.objectives "[$second]" \
    --modpo.margins "['$first=dpo:$out/$first/adapter','$third=dpo:$out/$third/adapter']" --modpo.weights "$middle" "${dpo_first[@]}" \
    --out "$out/modpo-middle"
  run train autoregressive --config "$here/../recipes/parm.yaml" --model "$model" --pairs "$pairs" --reward.objectives "$rewards" \
    "${guides[@]}" --out "$out/parm"
  for name in "${objectives[@]}"; do
    run train autoregressive --config "$here/../recipes/genarm.yaml" --model "$model" --pairs "$pairs" --reward.objectives "[$name]" \
      "${genarm[@]}" --out "$out/genarm-$name"
    scorer "$name"
  done
  sipo "['$first=0.5,$second=0.5,$third=0','$middle']" "['$middle']"
}

from_rewards() {
  run train value --run "$out/bank" "${value[@]}" --out "$out/values"
  value_model
  online_dpo
  morlhf "$first" "$first=1"
  morlhf "$second" "$second=1"
  morlhf "$third" "$third=1"
  morlhf middle "$middle"
  in_context
}

side_by_side from_rewards from_pairs

for name in "${objectives[@]}"; do # more of one, nothing less of the others
  ask=''
  for other in "${objectives[@]}"; do ask+=" $other>=$([ "$other" = "$name" ] && echo "$more" || echo keep)"; done
  run palette --bank "$out/bank" --ask "$ask" --dual grouped --out "$out/palette-$name"
done

tuned_at() { printf "'%s', " "${@/#/$out/}"; }
ends="'1,0,0', '0,1,0', '0,0,1'" # of those that read 40 candidates a token, which take minutes for every point
few="weights: [$ends, '0.3334,0.3333,0.3333']" ends="weights: [$ends]" # and of the others that cost more than a policy
messages="['$first=You are a helpful assistant. Answer in full, with details and examples.|You give short, vague answers.', \
'$second=You are a careful assistant. Refuse politely what could do harm.|You say whatever harms or offends.', \
'$third=You are a cheerful assistant. Be warm and hopeful.|You are gloomy and complain about everything.']"
chosen="rewards: $rewards, scale: '$out/scale.json'"
run compare --out "$out/compare" "${asked[@]}" --split test --samples 1 "${sampling[@]}" --sampling.batch_size 40 "${points[@]}" --rewards "$rewards" --judges "$judges" \
  --weights "['1,0,0', '0,1,0', '0,0,1', '0.5,0.5,0', '0.5,0,0.5', '0,0.5,0.5', '0.3334,0.3333,0.3333']" --methods "{\
soup: {soup: $tuned}, \
MOD: {mixing: $tuned}, \
MODPO: {policies: [$(tuned_at {"$first","$second","$third",modpo-half,modpo-middle}/adapter)]}, \
SIPO: {soup: $(each sipo/ /adapter)}, \
GenARM: {guides: $(each genarm- /adapter), beta: 2.0}, \
PARM: {guides: ['$out/parm/adapter'], beta: 2.0}, \
MORLHF: {policies: [$(tuned_at morlhf-{"$first","$second","$third",middle}/adapter)]}, \
online DPO: {policy: '$out/online-dpo/adapter'}, \
RiC: {in_context: '$out/ric-online'}, \
single-pass: {values: '$out/values'}, \
single-pass at 4 nats: {values: '$out/values', kl_budget: 4.0}, \
prefix: {values: '$out/values', form: prefix, $ends}, \
value model: {values: '$out/value-model', skip_above: 0.95, $ends}, \
ARGS: {scorers: $(each scorer- /model), $ends}, \
contrast of prompts: {messages: $messages, $few}, \
palette: {palettes: [$(tuned_at palette-{"$first","$second","$third"})]}, \
Monte Carlo of 4: {choice: {how: resampling, n: 4, beta: 0.3, $chosen}, $few}, \
rejection: {choice: {how: rejection, $chosen, segments: {threshold: 0.5, $segment}}, $few}, \
blocks: {choice: {how: blocks, block: 10, n: 4, $chosen}, $few}, \
single-pass best-of-4: {values: '$out/values', choice: {how: best_of, n: 4, $chosen}, $few}}"
