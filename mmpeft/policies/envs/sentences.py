"""What each Metaworld task is called in words, and which tasks need eyes or ears.

Five sentences a task: the first is the canonical one, the first three are for training, the last two are held out, so that an
evaluation with `instruction="heldout"` asks in words no policy was trained on. No sentence stands for two tasks.

Thirteen scenes are shared by two or three tasks, where only the sentence tells what to do (`SAME_SCENE`). In the others the picture
gives the task away, so a test of language must swap the sentence there.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mmpeft.errors import ConfigError, nearest

Wording = Literal["canonical", "train", "heldout"]
TRAIN = 3  # sentences of a task that training may use

SENTENCES: dict[str, tuple[str, str, str, str, str]] = {
    "assembly-v3": (
        "put the nut over the peg",
        "place the wrench ring onto the peg",
        "assemble the nut and the peg",
        "thread the ring over the standing peg",
        "get the nut down around the peg",
    ),
    "basketball-v3": (
        "dunk the ball into the basket",
        "drop the basketball through the hoop",
        "put the ball in the basket",
        "score with the basketball",
        "carry the ball to the hoop and let it fall in",
    ),
    "bin-picking-v3": (
        "move the cube from one bin to the other",
        "pick the block out of its bin and put it in the other bin",
        "transfer the cube between the bins",
        "relocate the block to the empty bin",
        "take the cube over into the second bin",
    ),
    "box-close-v3": (
        "close the box with the lid",
        "put the cover on the box",
        "place the lid on top of the box",
        "cover the open box",
        "grab the lid and shut the box with it",
    ),
    "button-press-topdown-v3": (
        "press the button from above",
        "push the button down",
        "press down on the top button",
        "hit the button with a downward push",
        "lower the hand onto the button",
    ),
    "button-press-topdown-wall-v3": (
        "reach over the wall and press the button from above",
        "press the button down behind the wall",
        "go past the wall and push the button down",
        "avoid the wall and hit the button with a downward push",
        "lower the hand onto the button beyond the wall",
    ),
    "button-press-v3": (
        "press the button",
        "push the button in",
        "press the button on the front of the box",
        "poke the front button",
        "drive the button into its box",
    ),
    "button-press-wall-v3": (
        "go around the wall and press the button",
        "push the button in behind the wall",
        "press the front button past the wall",
        "poke the button beyond the wall",
        "steer clear of the wall and drive the button in",
    ),
    "coffee-button-v3": (
        "press the button of the coffee machine",
        "push the coffee machine's button",
        "start the coffee machine",
        "switch on the coffee maker",
        "make the machine brew a coffee",
    ),
    "coffee-pull-v3": (
        "pull the mug away from the coffee machine",
        "drag the mug out from under the coffee machine",
        "bring the cup from the coffee machine to the goal",
        "retrieve the cup from the coffee maker",
        "slide the mug off toward the target",
    ),
    "coffee-push-v3": (
        "push the mug under the coffee machine",
        "slide the cup below the coffee machine",
        "put the mug in place at the coffee machine",
        "move the cup beneath the coffee maker",
        "shove the mug in so that it can be filled",
    ),
    "dial-turn-v3": (
        "turn the dial",
        "rotate the dial",
        "turn the knob around",
        "twist the round control",
        "spin the dial by half a turn",
    ),
    "disassemble-v3": (
        "lift the nut off the peg",
        "take the ring off the peg",
        "remove the nut from the peg",
        "pull the wrench ring up and away from the peg",
        "disassemble the nut and the peg",
    ),
    "door-close-v3": (
        "close the door",
        "push the door shut",
        "shut the open door",
        "swing the door closed",
        "press the door into its frame",
    ),
    "door-lock-v3": (
        "lock the door",
        "turn the lock to shut the door's bolt",
        "rotate the door lock clockwise",
        "secure the door with its lock",
        "bolt the door",
    ),
    "door-open-v3": (
        "open the door",
        "pull the door open by its handle",
        "swing the door open",
        "drag the handle to open the door",
        "get the closed door open",
    ),
    "door-unlock-v3": (
        "unlock the door",
        "turn the lock to free the door",
        "rotate the door lock counter-clockwise",
        "release the door's bolt",
        "undo the lock of the door",
    ),
    "drawer-close-v3": (
        "close the drawer",
        "push the drawer shut",
        "slide the drawer in",
        "shut the open drawer",
        "press the drawer back into the cabinet",
    ),
    "drawer-open-v3": (
        "open the drawer",
        "pull the drawer out",
        "slide the drawer open by its handle",
        "get the closed drawer open",
        "drag the drawer out of the cabinet",
    ),
    "faucet-close-v3": (
        "close the faucet",
        "turn the faucet off",
        "rotate the faucet handle clockwise",
        "shut the tap",
        "stop the water at the tap",
    ),
    "faucet-open-v3": (
        "open the faucet",
        "turn the faucet on",
        "rotate the faucet handle counter-clockwise",
        "open up the tap",
        "let the water run from the tap",
    ),
    "hammer-v3": (
        "drive the nail in with the hammer",
        "hammer the nail",
        "pick up the hammer and hit the nail",
        "strike the nail with the hammer",
        "use the tool to knock the nail into the wall",
    ),
    "hand-insert-v3": (
        "put the block into the hole in the table",
        "insert the gripper with the block into the hole",
        "push the object into the hole",
        "lower the block down the hole",
        "stow the block inside the opening",
    ),
    "handle-press-side-v3": (
        "press the side handle down",
        "push the handle down from the side",
        "press down the handle at the side",
        "lower the sideways lever handle",
        "force the handle at the side to the bottom",
    ),
    "handle-press-v3": (
        "press the handle down",
        "push the handle downward",
        "press down on the front handle",
        "lower the front handle",
        "force the handle in front to the bottom",
    ),
    "handle-pull-side-v3": (
        "pull the side handle up",
        "lift the handle at the side",
        "pull up the handle from the side",
        "raise the sideways lever handle",
        "bring the handle at the side to the top",
    ),
    "handle-pull-v3": (
        "pull the handle up",
        "lift the handle",
        "pull up the front handle",
        "raise the front handle",
        "bring the handle in front to the top",
    ),
    "lever-pull-v3": (
        "pull the lever up",
        "move the lever upward",
        "rotate the lever to point up",
        "raise the lever by a quarter turn",
        "flip the lever to its top position",
    ),
    "peg-insert-side-v3": (
        "insert the peg into the hole from the side",
        "push the peg sideways into the box",
        "put the peg in the side hole",
        "fit the peg into the opening of the box",
        "slide the stick into the hole in the block's side",
    ),
    "peg-unplug-side-v3": (
        "pull the peg out from the side",
        "unplug the peg sideways",
        "take the peg out of the side hole",
        "withdraw the peg from the box",
        "free the plugged peg",
    ),
    "pick-out-of-hole-v3": (
        "pick the puck up out of the hole",
        "lift the object out of the hole",
        "take the puck from the hole",
        "fetch the puck that lies in the hole",
        "raise the object from its hole to the goal",
    ),
    "pick-place-v3": (
        "pick the puck up and place it at the goal",
        "lift the puck to the goal",
        "pick and place the puck",
        "grasp the puck and carry it to the target",
        "hold the puck where the marker is",
    ),
    "pick-place-wall-v3": (
        "pick the puck up and place it behind the wall",
        "lift the puck over the wall to the goal",
        "carry the puck past the wall",
        "grasp the puck and bring it across the wall",
        "hold the puck at the marker beyond the wall",
    ),
    "plate-slide-back-side-v3": (
        "slide the plate back out of the cabinet sideways",
        "pull the plate sideways out of the goal",
        "move the plate from the cabinet to the side",
        "get the plate out of the cabinet toward the side",
        "drag the plate to the side and out",
    ),
    "plate-slide-back-v3": (
        "slide the plate back out of the cabinet",
        "pull the plate back toward the robot",
        "move the plate out of the cabinet",
        "get the plate out of the cabinet",
        "drag the plate straight back",
    ),
    "plate-slide-side-v3": (
        "slide the plate sideways into the cabinet",
        "push the plate to the side into the goal",
        "move the plate into the cabinet at the side",
        "get the plate into the sideways cabinet",
        "shove the plate to the side and in",
    ),
    "plate-slide-v3": (
        "slide the plate into the cabinet",
        "push the plate forward into the goal",
        "move the plate into the cabinet",
        "get the plate into the cabinet ahead",
        "shove the plate straight in",
    ),
    "push-back-v3": (
        "pull the puck back to the goal",
        "drag the puck back toward the robot",
        "bring the puck backward to the target",
        "haul the puck nearer to the marker",
        "move the puck back to where the marker is",
    ),
    "push-v3": (
        "push the puck to the goal",
        "slide the puck to the target",
        "move the puck forward to the goal",
        "shove the puck over the table to the marker",
        "get the puck across to the target spot",
    ),
    "push-wall-v3": (
        "push the puck around the wall to the goal",
        "slide the puck past the wall",
        "move the puck to the goal behind the wall",
        "shove the puck around the obstacle to the marker",
        "get the puck beyond the wall by pushing",
    ),
    "reach-v3": (
        "reach the goal",
        "move the hand to the goal",
        "bring the gripper to the target position",
        "touch the marker with the hand",
        "hover the gripper at the marked point",
    ),
    "reach-wall-v3": (
        "reach the goal behind the wall",
        "move the hand past the wall to the goal",
        "bring the gripper over the wall to the target",
        "touch the marker beyond the wall",
        "steer the hand clear of the wall to the point",
    ),
    "shelf-place-v3": (
        "put the puck on the shelf",
        "place the block on the shelf",
        "pick the puck up and set it on the shelf",
        "store the block on the rack",
        "lift the puck onto the shelf board",
    ),
    "soccer-v3": (
        "kick the ball into the goal",
        "push the soccer ball into the net",
        "score a goal with the soccer ball",
        "shoot the football into the net",
        "roll the ball into the soccer goal",
    ),
    "stick-pull-v3": (
        "pull the thermos with the stick",
        "hook the stick in the thermos handle and pull",
        "use the stick to drag the bottle",
        "draw the container closer with the stick",
        "take the stick and tow the thermos",
    ),
    "stick-push-v3": (
        "push the thermos with the stick",
        "use the stick to shove the bottle",
        "pick up the stick and push the thermos",
        "nudge the container along with the stick",
        "take the stick and move the thermos away",
    ),
    "sweep-into-v3": (
        "sweep the cube into the hole",
        "push the block into the hole in the table",
        "brush the cube into the opening",
        "slide the cube along until it falls in the hole",
        "wipe the block into the square hole",
    ),
    "sweep-v3": (
        "sweep the cube off the table",
        "push the block off the table",
        "brush the cube over the edge",
        "slide the cube along until it leaves the table",
        "wipe the block off the side",
    ),
    "window-close-v3": (
        "close the window",
        "slide the window shut",
        "push the window closed",
        "shut the open window",
        "move the pane until the window is closed",
    ),
    "window-open-v3": (
        "open the window",
        "slide the window open",
        "push the window to the side to open it",
        "get the closed window open",
        "move the pane until the window is open",
    ),
}

#: a policy that sees nothing but its own hand solves at most a fifth of these (25 demonstrations, 20 held-out seeds a task)
VISION_TASKS: tuple[str, ...] = tuple(
    f"{name}-v3"
    for name in (
        "assembly basketball bin-picking box-close coffee-pull coffee-push disassemble hammer hand-insert handle-pull handle-pull-side "
        "lever-pull peg-insert-side peg-unplug-side pick-out-of-hole pick-place pick-place-wall push push-back push-wall reach shelf-place "
        "soccer stick-pull"
    ).split()
)

#: tasks that start from one and the same scene, so that only the sentence tells them apart
SAME_SCENE: tuple[tuple[str, ...], ...] = (
    ("push-v3", "pick-place-v3", "reach-v3"),
    ("faucet-open-v3", "faucet-close-v3"),
    ("door-lock-v3", "door-unlock-v3"),
    ("handle-press-v3", "handle-pull-v3"),
    ("handle-press-side-v3", "handle-pull-side-v3"),
    ("window-open-v3", "window-close-v3"),
)


def sentence(task: str, wording: Wording, episode_seed: int) -> str:
    """The instruction of an episode: the canonical one, or one drawn by the seed from the training or the held-out ones.

    Raises:
        ConfigError: unknown wording.
    """
    five = SENTENCES[task]
    pools = {"canonical": five[:1], "train": five[:TRAIN], "heldout": five[TRAIN:]}
    if wording not in pools:
        raise ConfigError(
            f"instruction must be one of {', '.join(pools)}, got {wording!r}{nearest(str(wording), pools)}"
        )
    pool = pools[wording]
    return pool[int(np.random.default_rng([5, episode_seed]).integers(len(pool)))]
